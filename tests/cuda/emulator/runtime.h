// The emulator's state: one launch, one block, its threads. One system thread runs it all; tests
// run in parallel as processes, so that a seed always gives the same order.
#pragma once

#include <stdint.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/emulator/emulator.h"
#include "cuda/emulator/fiber.h"

namespace gemma2::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr size_t kSharedBytes = 227 * 1024;   // the most a block can have (compute capability 9.0)
constexpr size_t kSharedUnasked = 48 * 1024;  // static, or dynamic without cudaFuncSetAttribute

// ---- Who ran before whom ----
//
// Time is counted in epochs: every barrier that completes begins one, which is that of its threads
// until their next barrier. An access carries its thread's epoch, and is ordered before what thread
// b does now iff b has `seen` that epoch of the thread, through one barrier or a chain of them. The
// reads of a warp are kept together, under the latest epoch among its lanes: exact, unless lanes of
// one warp meet in parts (sync_warp with a mask), where a missing order may be seen too soon.

struct Thread {
  enum class State { ready, waiting, ended };

  int index;  // in the block
  uint3 at;
  int lane, warp;
  State state;
  const char* waits_for;  // while waiting
  void* site;             // where it waits
  uint32_t epoch;
  Fiber fiber;

  // Copies under way: groups ended by commit, the last one still open.
  struct Copy {
    uint32_t shared;  // offset
    const void* global;
    int bytes, read;
    uint8_t data[16];  // for early landing
  };
  std::vector<std::vector<Copy>> groups;

  // Counting: how often this thread has been at an access.
  std::unordered_map<void*, uint32_t> visits;
};

// Threads that wait for each other at one place.
struct Meeting {
  std::vector<int> threads;      // arrived
  int wanted = 0;                // how many are
  std::vector<char> waits;       // of those arrived: waits, or has gone on
  std::vector<uint32_t> epochs;  // of those arrived, then

  // What the thread has done up to `now`, and whether it waits here.
  void add(const Thread& t, bool wait, uint32_t now) {
    threads.push_back(t.index);
    waits.push_back(wait);
    epochs.push_back(now);
  }
};

struct WarpMeeting {
  unsigned arrived = 0, lanes = 0;
  const char* what = nullptr;
  void* data[kWarpSize] = {};
};

// What is known of a byte that several threads may touch.
struct Cell {
  uint32_t block = 0;  // serial number of the block of the accesses below
  uint32_t write_epoch = 0, read_epoch = 0;
  uint32_t read_lanes = 0;  // of warp `reader`
  int32_t many = -1;        // index of a ReadSet, if several warps have read
  int16_t writer = -1;      // thread; -1: none in this block
  int16_t reader = -1;      // warp; -1: none since the last write
  bool initialised = false;
  bool pending = false;  // an asynchronous copy is under way
  bool atomic = false;   // the last write was an atomic one
};

struct ReadSet {
  uint32_t epoch[kMaxWarps] = {}, lanes[kMaxWarps] = {};
};

struct Region {
  std::string name;
  const char* base;
  int64_t bytes;                      // of a piece
  std::vector<Dimension> dimensions;  // from the largest stride
  int64_t extent;                     // bytes from base to the end of the last piece
  Access access;
  // Of writable regions, one cell a byte of the extent; a page of them is made when it is touched.
  std::vector<std::unique_ptr<std::vector<Cell>>> pages;

  static constexpr int64_t kPage = 4096;
  Cell& cell(int64_t offset) {
    std::unique_ptr<std::vector<Cell>>& page = pages[offset / kPage];
    if (page == nullptr) {
      Cell fresh;
      fresh.initialised = access == Access::read_write;
      page = std::make_unique<std::vector<Cell>>(kPage, fresh);
    }
    return (*page)[offset % kPage];
  }
};

struct Counters {
  int64_t launches = 0, blocks = 0, threads = 0, barriers = 0;
  std::map<std::string, int64_t> instructions;  // by wrapper, a thread each
  struct Traffic {
    int64_t bytes = 0, requests = 0, sectors = 0;
    int64_t distinct = 0;  // sectors, each once a block: what a first-level cache lets through
  };
  Traffic global_read, global_write;
  std::map<std::string, int64_t> region_read, region_written;  // bytes
  struct Bank {
    int64_t accesses = 0, wavefronts = 0, ideal = 0;  // ideal: without conflicts
  };
  std::map<std::string, Bank> shared;  // by wrapper
};

// The lanes of one access of one warp, gathered while they pass it one after the other.
struct Request {
  const char* wrapper;
  Kind kind;
  bool shared;
  uint32_t bytes;
  unsigned lanes = 0;
  uintptr_t address[kWarpSize];
  int phase[kWarpSize];  // -1: by the width of the access
};

struct Runtime {
  Settings settings;
  std::vector<Region> regions;
  std::map<std::string, Counters> counters;

  // The launch
  bool running = false;    // inside a kernel's thread
  bool suspended = false;  // the emulator itself, on a thread's behalf
  const char* kernel = nullptr;
  dim3 grid, block;
  size_t dynamic_bytes = 0;
  const void* frame = nullptr;
  size_t frame_bytes = 0;
  void (*entry)(const void*) = nullptr;
  std::string text;  // the fault
  bool failed = false;
  Counters* counting = nullptr;
  uint64_t random = 0;
  uint32_t first_serial = 0;

  // The block
  uint32_t serial = 0;  // of all blocks ever
  uint3 block_at;
  std::vector<Thread> threads;
  Thread* current = nullptr;
  Fiber scheduler;
  std::vector<uint64_t> ready;  // one bit a thread
  int live = 0;
  uint32_t epoch = 0;
  std::vector<uint32_t> seen_by_all;        // since the last barrier of the block: thread -> epoch
  std::vector<std::vector<uint32_t>> view;  // of a thread, beyond seen_by_all
  std::vector<char> has_view, wide_view;    // wide: of other warps, too
  Meeting barrier;
  std::map<int, Meeting> named;
  std::vector<std::map<unsigned, Meeting>> warp_barriers;  // per warp, by mask
  std::vector<std::vector<WarpMeeting>> warps;
  std::map<std::pair<int, std::pair<void*, uint32_t>>, Request> requests;

  // Shared memory: dynamic first, then static objects with room between them
  std::vector<char> shared;
  size_t shared_used = 0;
  struct Piece {
    const void* key;
    size_t offset, bytes;
  };
  std::vector<Piece> pieces;
  std::vector<Cell> shared_cells;
  std::vector<ReadSet> read_sets;

  char* stacks = nullptr;
  size_t stack_bytes = 0;
};
Runtime& rt();

// ---- host.cpp ----
size_t shared_of_block();                           // of the emulated device
size_t dynamic_shared_allowed(const void* kernel);  // by cudaFuncSetAttribute, or unasked
uint64_t launch_bound(const void* kernel);          // threads; 0: none

// ---- scheduler.cpp ----
void wait_here(const char* what, void* site);  // until make_ready
void make_ready(int thread);
bool ordered_before_now(int thread, uint32_t epoch);  // for the current thread
[[noreturn]] void stop_with(std::string text);        // the running thread's fault, at its line

// ---- memory.cpp ----
void begin_block_memory();
// An access of `thread`, checked.
void check_access(const Thread& thread, const void* p, size_t bytes, Kind kind,
                  bool aligned = true);
enum class Where { shared, global, other };
Where where_is(const void* p, const Region** region);

// ---- counters.cpp ----
void note_access(const Thread& thread, const void* p, size_t bytes, Kind kind, const char* wrapper,
                 void* site, int phase);
void finish_block_counters();
std::string counters_json();

// ---- report.cpp ----
// "csrc/cuda/rms_norm.cu:57" of the running stack (site null) or of a return address.
std::string line_of(void* site);

}  // namespace gemma2::emulator
