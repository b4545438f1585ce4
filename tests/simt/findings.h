// What a run did wrong, and what it did, in counts; the first wrong of each kind is told.
#pragma once

#include <string>

enum Finding {
  kRace,          // two accesses to shared memory that no barrier orders, one of them a write
  kOutside,       // an access outside shared memory or the tensors, or a write to an input
  kTwice,         // an element of a result written again
  kUnawaited,     // a copy that nobody waited for
  kDivergent,     // threads of a warp at different collectives, or warps at a barrier that others never reach
  kMisaligned,    // an address that the instruction does not take
  kBankConflict,  // rows of a matrix in the same group of banks
  kProducts,      // not wrong, a measure of the work: products of matrices, loads of matrices
  kLoads,
  kFindings
};

struct Findings {
  long counts[kFindings] = {};
  std::string told;

  void add(Finding finding, const std::string& what) {
    if (!counts[finding]++) told += (told.empty() ? "" : "; ") + what;
  }
};

inline Findings findings;
