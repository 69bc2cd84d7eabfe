// Launches, blocks, threads and what they wait for.

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <sstream>

#include "cuda/emulator/runtime.h"

namespace gemma2::emulator {

Runtime& rt() {
  static Runtime runtime;
  return runtime;
}
Settings& settings() { return rt().settings; }

uint3 thread_index() { return rt().current->at; }
uint3 block_index() { return rt().block_at; }
dim3 block_dim() { return rt().block; }
dim3 grid_dim() { return rt().grid; }
int lane() { return rt().current->lane; }

namespace {

// SplitMix64 (Steele, Lea and Flood 2014).
uint64_t next_random() {
  uint64_t z = (rt().random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::string place() {
  Runtime& r = rt();
  std::ostringstream text;
  text << "kernel " << r.kernel << ", block (" << r.block_at.x << ", " << r.block_at.y << ", "
       << r.block_at.z << ")";
  if (r.current != nullptr)
    text << ", thread (" << r.current->at.x << ", " << r.current->at.y << ", " << r.current->at.z
         << ")";
  return text.str();
}

std::string thread_name(const Thread& t) {
  std::ostringstream text;
  text << "(" << t.at.x << ", " << t.at.y << ", " << t.at.z << ")";
  return text.str();
}

void back_to_scheduler() {
  Runtime& r = rt();
  r.running = false;
  switch_fiber(r.current->fiber, r.scheduler);
  r.running = true;
}

void thread_main() {
  Runtime& r = rt();
  r.running = true;
  r.entry(r.frame);
  r.running = false;
  r.current->state = Thread::State::ended;
  switch_fiber(r.current->fiber, r.scheduler);
  __builtin_unreachable();
}

// The next thread to run, or -1.
int pick() {
  Runtime& r = rt();
  const int words = static_cast<int>(r.ready.size());
  const int n = static_cast<int>(r.threads.size());
  const auto scan = [&](int from) {  // the first ready thread at or after `from`
    for (int w = from / 64; w < words; ++w) {
      uint64_t bits = r.ready[w];
      if (w == from / 64) bits &= ~uint64_t{0} << (from % 64);
      if (bits != 0) return w * 64 + __builtin_ctzll(bits);
    }
    return -1;
  };
  switch (r.settings.order) {
    case Order::forward:
      return scan(0);
    case Order::backward:
      for (int w = words - 1; w >= 0; --w)
        if (r.ready[w] != 0) return w * 64 + 63 - __builtin_clzll(r.ready[w]);
      return -1;
    case Order::random:
      break;
  }
  const int found = scan(static_cast<int>(next_random() % n));
  return found >= 0 ? found : scan(0);
}

// ---- Order of accesses ----

std::vector<uint32_t>& view_of(int t) {
  Runtime& r = rt();
  if (!r.has_view[t]) {
    std::fill(r.view[t].begin(), r.view[t].end(), 0);
    r.has_view[t] = 1;
  }
  return r.view[t];
}

void barrier_of_all_completes() {
  Runtime& r = rt();
  if (r.counting) ++r.counting->barriers;
  const uint32_t past = r.epoch, epoch = ++r.epoch;
  for (Thread& t : r.threads) {
    r.seen_by_all[t.index] = past;
    r.has_view[t.index] = r.wide_view[t.index] = 0;
    t.epoch = epoch;
  }
  for (int t : r.barrier.threads)
    if (r.threads[t].state == Thread::State::waiting) make_ready(t);
  r.barrier.threads.clear();
}

// `narrow`: of lanes of one warp.
void barrier_of_some_completes(const Meeting& m, bool narrow) {
  Runtime& r = rt();
  const std::vector<int>& threads = m.threads;
  const uint32_t epoch = ++r.epoch;
  bool wide = !narrow;
  for (int t : threads) wide = wide || r.wide_view[t];
  if (!wide) {  // lanes of one warp that know only of each other
    const int first = threads[0] / kWarpSize * kWarpSize;
    const int last = std::min<int>(first + kWarpSize, static_cast<int>(r.threads.size()));
    uint32_t joined[kWarpSize] = {};
    for (int t : threads) {
      if (r.has_view[t])
        for (int a = first; a < last; ++a)
          joined[a - first] = std::max(joined[a - first], r.view[t][a]);
    }
    for (size_t i = 0; i < threads.size(); ++i)
      joined[threads[i] - first] = std::max(joined[threads[i] - first], m.epochs[i]);
    for (int t : threads) {
      std::vector<uint32_t>& view = view_of(t);
      std::copy(joined, joined + (last - first), view.begin() + first);
    }
  } else {
    std::vector<uint32_t> joined(r.threads.size(), 0);
    for (int t : threads) {
      if (r.has_view[t])
        for (size_t a = 0; a < joined.size(); ++a) joined[a] = std::max(joined[a], r.view[t][a]);
    }
    for (size_t i = 0; i < threads.size(); ++i)
      joined[threads[i]] = std::max(joined[threads[i]], m.epochs[i]);
    for (size_t i = 0; i < threads.size(); ++i)
      if (m.waits[i]) {
        view_of(threads[i]) = joined;
        r.wide_view[threads[i]] = 1;
      }
  }
  for (size_t i = 0; i < threads.size(); ++i)
    if (m.waits[i]) r.threads[threads[i]].epoch = epoch;
}

// A thread has ended: barriers of the block wait for the others only.
void check_barrier() {
  Runtime& r = rt();
  if (!r.barrier.threads.empty() && static_cast<int>(r.barrier.threads.size()) == r.live)
    barrier_of_all_completes();
}

std::string who_waits() {
  Runtime& r = rt();
  struct Place {
    int count = 0;
    std::string first;
  };
  std::map<std::string, Place> places;
  int ended = 0;
  for (const Thread& t : r.threads) {
    if (t.state == Thread::State::ended) ++ended;
    if (t.state != Thread::State::waiting) continue;
    Place& at = places[std::string(t.waits_for) + " at " + line_of(t.site)];
    if (at.count++ == 0) at.first = thread_name(t);
  }
  std::ostringstream text;
  text << "deadlock: ";
  for (const auto& [what, at] : places)
    text << at.count << " thread(s) from " << at.first << " on wait for " << what << "; ";
  text << ended << " have ended";
  return text.str();
}

void run_block() {
  Runtime& r = rt();
  ++r.serial;
  const int n = static_cast<int>(r.threads.size());
  r.live = n;
  r.epoch = 1;
  r.barrier.threads.clear();
  r.named.clear();
  r.warps.assign((n + kWarpSize - 1) / kWarpSize, {});
  r.warp_barriers.assign(r.warps.size(), {});
  std::fill(r.seen_by_all.begin(), r.seen_by_all.end(), 0);
  std::fill(r.has_view.begin(), r.has_view.end(), 0);
  std::fill(r.wide_view.begin(), r.wide_view.end(), 0);
  begin_block_memory();
  for (Thread& t : r.threads) {
    t.state = Thread::State::ready;
    t.epoch = 1;
    t.groups.clear();
    t.groups.emplace_back();
    // Tops at different offsets, or all stacks would share a few lines of the processor's cache.
    const size_t colour = t.index * 320 % 16384 / 16 * 16;
    t.fiber.prepare(r.stacks + t.index * r.stack_bytes, r.stack_bytes - colour, thread_main);
    make_ready(t.index);
  }
  while (r.live > 0) {
    const int next = pick();
    if (next < 0) {
      r.current = nullptr;
      r.text = place() + ": " + who_waits();
      r.failed = true;
      return;
    }
    r.ready[next / 64] &= ~(uint64_t{1} << (next % 64));
    r.current = &r.threads[next];
    r.current->state = Thread::State::ready;
    switch_fiber(r.scheduler, r.current->fiber);
    r.running = false;
    if (r.failed) return;
    if (r.current->state == Thread::State::ended) {
      --r.live;
      check_barrier();
    }
  }
  if (r.counting) finish_block_counters();
}

void prepare_threads() {
  Runtime& r = rt();
  const int n = static_cast<int>(r.block.x * r.block.y * r.block.z);
  r.threads.resize(n);
  r.ready.assign((n + 63) / 64, 0);
  r.seen_by_all.assign(n, 0);
  r.has_view.assign(n, 0);
  r.wide_view.assign(n, 0);
  r.view.resize(n);
  for (int t = 0; t < n; ++t) {
    r.view[t].resize(n);
    Thread& thread = r.threads[t];
    thread.index = t;
    thread.at = {t % r.block.x, t / r.block.x % r.block.y, t / (r.block.x * r.block.y)};
    thread.lane = t % kWarpSize;
    thread.warp = t / kWarpSize;
    thread.waits_for = nullptr;
  }
  if (r.stacks == nullptr) {
    r.stack_bytes = 256 * 1024;
    void* p = mmap(nullptr, kMaxThreads * r.stack_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    r.stacks = static_cast<char*>(p);
  }
}

}  // namespace

void make_ready(int thread) { rt().ready[thread / 64] |= uint64_t{1} << (thread % 64); }

bool ordered_before_now(int thread, uint32_t epoch) {
  Runtime& r = rt();
  const int me = r.current->index;
  if (thread == me || r.seen_by_all[thread] >= epoch) return true;
  return r.has_view[me] && r.view[me][thread] >= epoch;
}

void wait_here(const char* what, void* site) {
  Runtime& r = rt();
  r.current->state = Thread::State::waiting;
  r.current->waits_for = what;
  r.current->site = site;
  back_to_scheduler();
}

void stop_with(std::string text) {
  Runtime& r = rt();
  r.suspended = true;
  r.text = place() + ", " + line_of(nullptr) + ": " + text;
  r.failed = true;
  back_to_scheduler();
  __builtin_unreachable();
}

void fault(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  stop_with(text);
}

// ---- Barriers ----

void block_barrier() {
  Runtime& r = rt();
  r.barrier.threads.push_back(r.current->index);
  if (r.counting) ++r.counting->instructions["sync_block"];
  if (static_cast<int>(r.barrier.threads.size()) == r.live) {
    barrier_of_all_completes();
    return;
  }
  wait_here("sync_block", __builtin_return_address(0));
}

void named_barrier(int id, int threads, bool wait) {
  Runtime& r = rt();
  if (id < 1 || id > 15) fault("barrier: id is %d: 1 to 15 is wanted", id);
  if (threads <= 0 || threads % kWarpSize != 0)
    fault("barrier %d: of %d threads: a multiple of 32 is wanted", id, threads);
  if (r.counting) ++r.counting->instructions[wait ? "barrier_sync" : "barrier_arrive"];
  Meeting& m = r.named[id];
  if (m.threads.empty()) m.wanted = threads;
  if (m.wanted != threads)
    fault("barrier %d: of %d threads, but the others there say %d", id, threads, m.wanted);
  for (size_t i = 0; i < m.threads.size(); ++i)
    if (m.threads[i] == r.current->index)
      fault("barrier %d: the thread arrives twice before the others have come", id);
  m.add(*r.current, wait, r.epoch);
  if (static_cast<int>(m.threads.size()) < m.wanted) {
    // What comes after an arrival is not ordered by it.
    if (wait)
      wait_here("barrier_sync", __builtin_return_address(0));
    else
      r.current->epoch = ++r.epoch;
    return;
  }
  const Meeting done = std::move(m);
  r.named.erase(id);
  if (r.counting) ++r.counting->barriers;
  barrier_of_some_completes(done, false);
  if (!wait) r.current->epoch = ++r.epoch;
  for (size_t i = 0; i < done.threads.size(); ++i)
    if (done.waits[i] && done.threads[i] != r.current->index) make_ready(done.threads[i]);
}

void warp_barrier(unsigned lanes) {
  Runtime& r = rt();
  Thread& me = *r.current;
  if (!(lanes >> me.lane & 1))
    fault("sync_warp: lane %d is not in its mask 0x%08x", me.lane, lanes);
  if (r.counting) ++r.counting->instructions["sync_warp"];
  Meeting& m = r.warp_barriers[me.warp][lanes];
  m.add(me, true, r.epoch);
  if (static_cast<int>(m.threads.size()) < __builtin_popcount(lanes)) {
    wait_here("sync_warp", __builtin_return_address(0));
    return;
  }
  const Meeting done = std::move(m);
  r.warp_barriers[me.warp].erase(lanes);
  barrier_of_some_completes(done, true);
  for (int t : done.threads)
    if (t != me.index) make_ready(t);
}

void device_fence() {
  if (rt().counting) ++rt().counting->instructions["fence_device"];
}

// ---- Instructions of a warp ----

void meet(const char* what, unsigned lanes, void* data,
          void (*work)(void* const* data, unsigned lanes)) {
  Runtime& r = rt();
  Thread& me = *r.current;
  me.site = __builtin_return_address(0);
  if (!(lanes >> me.lane & 1)) fault("%s: lane %d is not in its mask 0x%08x", what, me.lane, lanes);
  const int first = me.warp * kWarpSize;
  for (int l = 0; l < kWarpSize; ++l) {
    if (!(lanes >> l & 1)) continue;
    if (first + l >= static_cast<int>(r.threads.size()))
      fault("%s: the mask 0x%08x has lane %d, and the block ends before it", what, lanes, l);
    if (r.threads[first + l].state == Thread::State::ended)
      fault("%s: the mask 0x%08x has lane %d, which has ended", what, lanes, l);
  }
  if (r.counting) ++r.counting->instructions[what];
  // Lanes that have diverged may meet in parts.
  std::vector<WarpMeeting>& meetings = r.warps[me.warp];
  WarpMeeting* found = nullptr;
  for (WarpMeeting& other : meetings) {
    if (!(other.lanes >> me.lane & 1)) continue;
    if (std::string(other.what) != what)
      fault("%s: lanes 0x%08x of the warp wait for this one at %s", what, other.arrived,
            other.what);
    if (other.lanes != lanes)
      fault("%s: the mask is 0x%08x, but lanes 0x%08x say 0x%08x", what, lanes, other.arrived,
            other.lanes);
    found = &other;
  }
  if (found == nullptr) {
    for (const WarpMeeting& other : meetings)
      if (other.lanes & lanes)
        fault("%s: the mask is 0x%08x, but lanes 0x%08x say 0x%08x", what, lanes, other.arrived,
              other.lanes);
    meetings.push_back({0, lanes, what, {}});
    found = &meetings.back();
  }
  WarpMeeting& m = *found;
  m.arrived |= 1u << me.lane;
  m.data[me.lane] = data;
  if (m.arrived != lanes) {
    wait_here(what, __builtin_return_address(0));
    return;
  }
  const WarpMeeting done = m;
  meetings.erase(meetings.begin() + (found - meetings.data()));
  r.suspended = true;
  work(done.data, lanes);
  r.suspended = false;
  for (int l = 0; l < kWarpSize; ++l)
    if ((lanes >> l & 1) && l != me.lane) make_ready(first + l);
}

// ---- Launch ----

const char* run_launch(const char* name, const void* kernel, dim3 grid, dim3 block,
                       size_t dynamic_shared, const void* frame, size_t frame_bytes,
                       void (*entry)(const void*)) {
  Runtime& r = rt();
  r.kernel = name;
  r.grid = grid;
  r.block = block;
  r.dynamic_bytes = dynamic_shared;
  r.frame = frame;
  r.frame_bytes = frame_bytes;
  r.entry = entry;
  r.failed = r.suspended = r.running = false;
  r.text.clear();
  r.random = r.settings.seed;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, bound = launch_bound(kernel);
  std::ostringstream bad;
  if (threads == 0 || threads > kMaxThreads)
    bad << "a block of " << threads << " threads: 1 to 1024 are possible";
  else if (bound > 0 && threads > bound)
    bad << "a block of " << threads << " threads: its __launch_bounds__ are " << bound;
  else if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    bad << "a grid of (" << grid.x << ", " << grid.y << ", " << grid.z
        << "): at most (2^31 - 1, 65535, 65535) is possible";
  else if (dynamic_shared > shared_of_block())
    bad << dynamic_shared << " bytes of shared memory: a block has at most " << shared_of_block();
  else if (dynamic_shared > dynamic_shared_allowed(kernel))
    bad << dynamic_shared << " bytes of dynamic shared memory: cudaFuncSetAttribute has allowed "
        << dynamic_shared_allowed(kernel);
  if (bad.tellp() > 0) {
    r.text = std::string("kernel ") + name + ": " + bad.str();
    return r.text.c_str();
  }
  r.counting = r.settings.counting ? &r.counters[name] : nullptr;
  prepare_threads();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (r.counting) {
    ++r.counting->launches;
    r.counting->blocks += blocks;
    r.counting->threads += blocks * threads;
  }
  r.first_serial = r.serial + 1;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (r.settings.order == Order::backward) std::reverse(order.begin(), order.end());
  if (r.settings.order == Order::random)
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  for (const uint64_t b : order) {
    r.block_at = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
    if (r.failed) {
      std::fill(r.ready.begin(), r.ready.end(), 0);
      return r.text.c_str();
    }
  }
  return nullptr;
}

}  // namespace gemma2::emulator
