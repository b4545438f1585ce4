// Threads of a block as fibers: each has a stack of its own, and runs until it waits for others.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>

#if !defined(__x86_64__)
#error "the switch of stacks is written for x86-64"
#endif

// Saves where the caller is in *from, and goes on at to.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
)");

constexpr size_t kStack = size_t{128} << 10;

// Stacks for a block's threads; pages that nobody touches take no memory.
class Stacks {
 public:
  explicit Stacks(size_t threads) : bytes_(threads * kStack) {
    base_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  ~Stacks() { munmap(base_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // Where a switch has to go for `entry` to begin on this thread's stack.
  void* start(size_t thread, void (*entry)()) {
    void** top = reinterpret_cast<void**>(base_ + (thread + 1) * kStack) - 8;
    *--top = nullptr;  // entry returns nowhere, and its frame is aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    return top;
  }

 private:
  size_t bytes_;
  char* base_;
};
