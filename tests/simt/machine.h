// A multiprocessor on the CPU: the threads of one block take turns, warp by warp, and meet at collectives and barriers.
//
// A thread runs until it needs others. When all 32 of a warp have come to the same collective it is carried out; when
// all warps have come to the barrier they go on, in an order that a seed chooses.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>

#include "fiber.h"
#include "memory.h"

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  using Collective = void (*)(Thread* warp);

  void* stack;
  Collective waits_at;
  const void *in, *more;  // operands
  void* out;
  int number;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
};

// These two are reached, not carried out.
inline void block_barrier(Thread*) {}
inline void end_of_thread(Thread*) {}

inline void warp_barrier(Thread* warp) { shared_memory.pass_warp_barrier(warp->number / 32); }

struct Machine {
  std::vector<Thread> threads;
  std::function<void()> kernel;
  void* scheduler = nullptr;
  int running = 0;
  int64_t block = 0;
  unsigned seed = 0;

  Thread& thread() { return threads[running]; }

  // Called by a thread: the others have their turn until the collective is done.
  void meet(Thread::Collective collective, const void* in = nullptr, const void* more = nullptr, void* out = nullptr) {
    Thread& me = thread();
    me.waits_at = collective, me.in = in, me.more = more, me.out = out;
    simt_switch(&me.stack, scheduler);
  }

  void run(int64_t blocks, int size, size_t shared, std::function<void()> body);

 private:
  void run_block(Stacks& stacks, size_t shared, std::mt19937& random);
  bool run_warp(int warp);
  bool pass_barrier(int warps);
};

inline Machine machine;

[[noreturn]] inline void thread_main() {
  machine.kernel();
  for (;;) machine.meet(&end_of_thread);
}

// Until the barrier or the end; false where the warp's threads part.
inline bool Machine::run_warp(int warp) {
  Thread* const first = &threads[warp * 32];
  for (;;) {
    for (int lane = 0; lane < 32; ++lane) {
      running = warp * 32 + lane;
      simt_switch(&scheduler, first[lane].stack);
    }
    for (int lane = 1; lane < 32; ++lane)
      if (first[lane].waits_at != first->waits_at) {
        findings.add(kDivergent, "lanes 0 and " + std::to_string(lane) + " of warp " + std::to_string(warp) +
                                     " part in block " + std::to_string(block));
        return false;
      }
    if (first->waits_at == &block_barrier || first->waits_at == &end_of_thread) return true;
    first->waits_at(first);
  }
}

// Lets everybody through, with whether any thread came with true; false where some warps have ended.
inline bool Machine::pass_barrier(int warps) {
  bool any = false;
  for (int warp = 0; warp < warps; ++warp)
    if (threads[warp * 32].waits_at == &end_of_thread) {
      findings.add(kDivergent, "warp " + std::to_string(warp) + " ended before a barrier that others wait at");
      return false;
    }
  for (Thread& each : threads) any |= each.in && *static_cast<const bool*>(each.in);
  for (Thread& each : threads)
    if (each.out) *static_cast<bool*>(each.out) = any;
  shared_memory.pass_block_barrier();
  return true;
}

inline void Machine::run_block(Stacks& stacks, size_t shared, std::mt19937& random) {
  const int warps = int(threads.size()) / 32;
  shared_memory.start(shared, warps);
  for (size_t i = 0; i < threads.size(); ++i)
    threads[i] = {stacks.start(i, &thread_main), nullptr, nullptr, nullptr, nullptr, int(i), {}, {}};
  std::vector<int> order(warps);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (int warp : order)
      if (!run_warp(warp)) return;
    const auto ended = [](const Thread& each) { return each.waits_at == &end_of_thread; };
    if (std::all_of(threads.begin(), threads.end(), ended)) break;
    if (!pass_barrier(warps)) return;
  }
  for (const Thread& each : threads) {
    bool pending = !each.open.empty();
    for (const auto& group : each.committed) pending |= !group.empty();
    if (pending) findings.add(kUnawaited, "thread " + std::to_string(each.number) + " ends before its copies");
  }
}

inline void Machine::run(int64_t blocks, int size, size_t shared, std::function<void()> body) {
  if (size % 32) throw std::runtime_error("a block of " + std::to_string(size) + " threads has no whole warps");
  threads.resize(size);
  kernel = std::move(body);
  Stacks stacks(size);
  std::mt19937 random(seed);
  for (block = 0; block < blocks; ++block) run_block(stacks, shared, random);
}
