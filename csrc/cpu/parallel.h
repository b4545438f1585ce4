// Threads and scratch memory: loops on OpenMP's pool, which is PyTorch's own, and one arena a thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#if defined(PARALLEL_ON_STD_THREADS)
#include <mutex>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#if defined(PARALLEL_ON_STD_THREADS)
inline thread_local bool in_parallel = false;

// In builds for sanitizers: how OpenMP's pool synchronises is nothing that they see. Dealt out in turn, without an
// atomic that would synchronise tasks by the way.
template <class Task>
void run_on_std_threads(int64_t count, int64_t threads, const Task& task) {
  std::exception_ptr failure;
  std::mutex of_failure;
  const auto work = [&](int64_t first) {
    in_parallel = true;
    for (int64_t i = first; i < count; i += threads) try {
        task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(of_failure);
        failure = std::current_exception();
      }
    in_parallel = false;
  };
  std::vector<std::thread> others;
  for (int64_t first = 1; first < std::min(threads, count); ++first) others.emplace_back(work, first);
  work(0);
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}
#endif

// Calls task(i) for i in [0, count), begun in this order: a task may wait for those before it. Rethrows what one
// throws.
template <class Task>
void parallel_for(int64_t count, [[maybe_unused]] int threads, const Task& task) {
#if defined(PARALLEL_ON_STD_THREADS)
  if (threads > 1 && count > 1 && !in_parallel) return run_on_std_threads(count, threads, task);
#elif defined(_OPENMP)
  if (threads > 1 && count > 1 && !omp_in_parallel()) {
    std::exception_ptr failure;
#pragma omp parallel for num_threads(int(std::min<int64_t>(threads, count))) schedule(monotonic : dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      try {
        task(i);
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) task(i);
}

// A thread's scratch memory, kept from call to call. It stays uninitialised.
class Arena {
 public:
  static constexpr size_t kKept = size_t{8} << 20;  // bytes; what a long sequence needs beyond goes back after the call

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }

  template <class T>
  T* array(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

  float* floats(size_t count) { return array<float>(count); }

  void trim() {
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Whether an operation is too small to be worth waking other threads, which takes a few microseconds.
inline bool is_small(double flops) {
#if defined(PARALLEL_ON_STD_THREADS)
  return flops < 0;  // none is: the problems of tests are small
#else
  return flops < 2.5e6;
#endif
}
