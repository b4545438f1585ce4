// Every access to memory, checked: shared memory for races, global memory for its bounds.
//
// Two accesses to the same four bytes of shared memory race if one of them writes, two threads make them, and no
// barrier lies between: of the block, or of the warp if both threads are in it.
#pragma once

#include <cstdint>
#include <vector>

#include "findings.h"

struct When {
  int thread = -1;
  unsigned block_epoch = 0, warp_epoch = 0;  // barriers passed
};

class SharedMemory {
 public:
  void start(size_t bytes, int warps) {
    bytes_.assign(bytes + kAlign, 0xff);  // as floating-point numbers: nan
    begin_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes_.data()) + kAlign - 1) / kAlign * kAlign);
    size_ = bytes;
    granules_.assign(bytes / 4 + 1, {});
    warp_epochs_.assign(warps, 0);
    block_epoch_ = 0;
  }

  char* begin() const { return begin_; }
  void pass_block_barrier() { ++block_epoch_; }
  void pass_warp_barrier(int warp) { ++warp_epochs_[warp]; }

  // False where the access must not happen.
  bool access(const void* at, size_t bytes, bool writes, int thread) {
    const ptrdiff_t offset = static_cast<const char*>(at) - begin_;
    if (offset < 0 || size_t(offset) + bytes > size_) {
      findings.add(kOutside, "thread " + std::to_string(thread) + " is at byte " + std::to_string(offset) +
                                 " of shared memory, which has " + std::to_string(size_));
      return false;
    }
    if (reinterpret_cast<uintptr_t>(at) % bytes)
      findings.add(kMisaligned, "shared byte " + std::to_string(offset) + " by " + std::to_string(bytes));
    for (size_t granule = offset / 4; granule <= (offset + bytes - 1) / 4; ++granule)
      note(granules_[granule], writes, thread, granule * 4);
    return true;
  }

 private:
  static constexpr size_t kAlign = 1024;

  struct Granule {
    When written, read;
    unsigned reading_epoch = 0;  // of the block, and the warps that read in it
    uint32_t reading_warps = 0;
  };

  bool is_ordered(const When& before, int thread) const {
    if (before.thread < 0 || before.thread == thread || before.block_epoch != block_epoch_) return true;
    return before.thread / 32 == thread / 32 && before.warp_epoch != warp_epochs_[thread / 32];
  }

  void note(Granule& granule, bool writes, int thread, size_t offset) {
    const int warp = thread / 32;
    const When now{thread, block_epoch_, warp_epochs_[warp]};
    if (!is_ordered(granule.written, thread)) race(offset, granule.written.thread, thread, writes ? "write" : "read");
    if (!writes) {
      if (granule.reading_epoch != block_epoch_) granule.reading_warps = 0;
      granule.reading_epoch = block_epoch_, granule.reading_warps |= 1u << warp;
      granule.read = now;
      return;
    }
    const bool others = granule.reading_epoch == block_epoch_ && (granule.reading_warps & ~(1u << warp));
    if (others || !is_ordered(granule.read, thread)) race(offset, granule.read.thread, thread, "overwrite");
    granule.written = now;
  }

  void race(size_t offset, int before, int after, const char* what) {
    findings.add(kRace, "threads " + std::to_string(before) + " and " + std::to_string(after) +
                            " race for shared byte " + std::to_string(offset) + ", the second to " + what);
  }

  std::vector<char> bytes_;
  char* begin_ = nullptr;
  size_t size_ = 0;
  std::vector<Granule> granules_;
  std::vector<unsigned> warp_epochs_;
  unsigned block_epoch_ = 0;
};

// The tensors of a call; an access to any other address is refused.
class GlobalMemory {
 public:
  void clear() { ranges_.clear(); }

  void add(const char* begin, size_t bytes, bool writable) {
    ranges_.push_back({begin, bytes, writable, std::vector<bool>(writable ? bytes : 0)});
  }

  bool access(const void* at, size_t bytes, bool writes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes) findings.add(kMisaligned, "global by " + std::to_string(bytes));
    for (Range& range : ranges_) {
      const ptrdiff_t offset = static_cast<const char*>(at) - range.begin;
      if (offset < 0 || size_t(offset) + bytes > range.bytes || (writes && !range.writable)) continue;
      if (writes) {
        if (range.written[offset])
          findings.add(kTwice, "byte " + std::to_string(offset) + " of a result is written twice");
        for (size_t i = 0; i < bytes; ++i) range.written[offset + i] = true;
      }
      return true;
    }
    findings.add(kOutside, std::string(writes ? "a write" : "a read") + " of " + std::to_string(bytes) +
                               " bytes outside every tensor");
    return false;
  }

 private:
  struct Range {
    const char* begin;
    size_t bytes;
    bool writable;
    std::vector<bool> written;
  };
  std::vector<Range> ranges_;
};

inline SharedMemory shared_memory;
inline GlobalMemory global_memory;
