// Who may touch what, and who touched it before: regions, shared memory, and a cell for every byte
// that can be written.

#include <dlfcn.h>
#include <link.h>
#include <string.h>

#include <algorithm>
#include <sstream>

#include "cuda/emulator/runtime.h"

namespace gemma2::emulator {
namespace {

constexpr unsigned char kPoisonByte = 0xb5;
constexpr size_t kRedZone = 64;  // bytes between static objects that no one may touch

// Offset of p in the region's extent if [p, p + bytes) lies in one piece; -1 otherwise.
int64_t offset_in(const Region& region, const char* p, int64_t bytes) {
  const int64_t offset = p - region.base;
  if (offset < 0 || offset >= region.extent) return -1;
  int64_t rest = offset;
  for (const Dimension& d : region.dimensions)
    rest -= std::min(rest / d.stride, d.count - 1) * d.stride;
  return rest + bytes <= region.bytes ? offset : -1;
}

// Tensors of a call may be the same memory: who writes means the one that is written.
Region* region_of(const char* p, int64_t bytes, Kind kind, int64_t* offset) {
  Region* found = nullptr;
  for (Region& region : rt().regions) {
    const int64_t at = offset_in(region, p, bytes);
    if (at < 0) continue;
    if (found == nullptr || found->access == Access::read) {
      *offset = at;
      found = &region;
    }
    if (kind == Kind::read || found->access != Access::read) break;
  }
  return found;
}

// What the region nearest to a wild pointer is called.
std::string described(const char* p) {
  const Region* nearest = nullptr;
  int64_t distance = INT64_MAX;
  for (const Region& region : rt().regions) {
    const int64_t d = p < region.base                    ? region.base - p
                      : p >= region.base + region.extent ? p - region.base - region.extent
                                                         : 0;
    if (d < distance) distance = d, nearest = &region;
  }
  std::ostringstream text;
  if (nearest == nullptr || distance > (1 << 20)) {
    text << "address " << static_cast<const void*>(p) << ", near no tensor of the call";
    return text.str();
  }
  const int64_t offset = p - nearest->base;
  text << nearest->name << " + " << offset << " bytes";
  if (offset < 0)
    text << " (before its start)";
  else if (offset >= nearest->extent)
    text << " (" << offset - nearest->extent << " bytes behind its end)";
  else
    text << " (runs out of a row of " << nearest->bytes << " bytes)";
  return text.str();
}

const char* verb(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic";
}

std::string name_of(int thread) {
  const uint3 at = rt().threads[thread].at;
  std::ostringstream text;
  text << "(" << at.x << ", " << at.y << ", " << at.z << ")";
  return text.str();
}

[[noreturn]] void bad_access(Kind kind, size_t bytes, const std::string& what) {
  std::ostringstream text;
  text << verb(kind) << " of " << bytes << " bytes: " << what;
  stop_with(text.str());
}

// Reads are kept by warp: the epoch of the latest and the lanes that took part.
bool reads_ordered(int warp, uint32_t lanes, uint32_t epoch) {
  const int n = static_cast<int>(rt().threads.size());
  for (; lanes != 0; lanes &= lanes - 1) {
    const int t = warp * kWarpSize + __builtin_ctz(lanes);
    if (t < n && !ordered_before_now(t, epoch)) return false;
  }
  return true;
}

// A byte, named only if something is wrong with it.
struct Spot {
  const Region* region;  // null: shared memory
  size_t offset;

  std::string name() const {
    return region == nullptr ? "shared memory at " + std::to_string(offset)
                             : region->name + " + " + std::to_string(offset) + " bytes";
  }
};

void check_cell(Cell& cell, const Thread& thread, Kind kind, size_t bytes, const Spot& spot) {
  Runtime& r = rt();
  if (cell.pending)
    bad_access(kind, bytes,
               spot.name() +
                   ": an asynchronous copy to it is under way: copy_async_wait is missing "
                   "or waits for too few groups");
  if (kind != Kind::write && !cell.initialised)
    bad_access(kind, bytes, spot.name() + ": never written");
  if (cell.block != r.serial) {
    const bool same_launch = cell.block >= r.first_serial;
    const bool written = cell.writer >= 0 && !(cell.atomic && kind == Kind::atomic);
    if (same_launch && (written || (cell.reader >= 0 && kind != Kind::read)))
      bad_access(kind, bytes,
                 spot.name() + ": race between blocks: another block of the launch " +
                     (written ? "writes" : "reads") + " it");
    // Two blocks' reads, or two blocks' atomics: the older is forgotten.
    const bool initialised = cell.initialised;
    cell = {};
    cell.block = r.serial;
    cell.initialised = initialised;
  }
  // Against the last write
  if (cell.writer >= 0 && !(cell.atomic && kind == Kind::atomic) &&
      !ordered_before_now(cell.writer, cell.write_epoch))
    bad_access(kind, bytes,
               spot.name() + ": race: thread " + name_of(cell.writer) +
                   " wrote it, and no barrier stands between");
  if (kind == Kind::read) {
    const uint32_t lane = 1u << thread.lane;
    if (cell.many < 0 && (cell.reader < 0 || cell.reader == thread.warp)) {
      const bool first = cell.reader < 0;
      cell.read_lanes = first ? lane : cell.read_lanes | lane;
      cell.read_epoch = first ? thread.epoch : std::max(cell.read_epoch, thread.epoch);
      cell.reader = static_cast<int16_t>(thread.warp);
      return;
    }
    if (cell.many < 0) {
      cell.many = static_cast<int32_t>(r.read_sets.size());
      r.read_sets.emplace_back();
      r.read_sets.back().epoch[cell.reader] = cell.read_epoch;
      r.read_sets.back().lanes[cell.reader] = cell.read_lanes;
    }
    ReadSet& set = r.read_sets[cell.many];
    set.epoch[thread.warp] = std::max(set.epoch[thread.warp], thread.epoch);
    set.lanes[thread.warp] |= lane;
    return;
  }
  // Against the reads since then
  if (cell.reader >= 0) {
    int guilty = -1;
    if (cell.many < 0) {
      if (!reads_ordered(cell.reader, cell.read_lanes, cell.read_epoch)) guilty = cell.reader;
    } else {
      const ReadSet& set = r.read_sets[cell.many];
      for (int w = 0; w < kMaxWarps && guilty < 0; ++w)
        if (!reads_ordered(w, set.lanes[w], set.epoch[w])) guilty = w;
    }
    if (guilty >= 0)
      bad_access(kind, bytes,
                 spot.name() + ": race: a thread of warp " + std::to_string(guilty) +
                     " read it, and no barrier stands between");
  }
  cell.writer = static_cast<int16_t>(thread.index);
  cell.write_epoch = thread.epoch;
  cell.atomic = kind == Kind::atomic;
  cell.reader = -1;
  cell.many = -1;
  cell.initialised = true;
}

bool in_image(const char* p) {
  struct Query {
    const char* p;
    bool found;
  } query = {p, false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Query& q = *static_cast<Query*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& segment = info->dlpi_phdr[i];
          const char* base = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
          if (segment.p_type == PT_LOAD && q.p >= base && q.p < base + segment.p_memsz)
            q.found = true;
        }
        return q.found ? 1 : 0;
      },
      &query);
  return query.found;
}

// Whether all of [offset, offset + bytes) belongs to the launch's dynamic memory or a static
// object.
bool shared_exists(size_t offset, size_t bytes) {
  Runtime& r = rt();
  if (offset + bytes <= r.dynamic_bytes) return true;
  for (const Runtime::Piece& piece : r.pieces)
    if (offset >= piece.offset && offset + bytes <= piece.offset + piece.bytes) return true;
  return false;
}

}  // namespace

// ---- Regions ----

void add_region(const char* name, const void* p, int64_t bytes,
                std::initializer_list<Dimension> dimensions, Access access) {
  Runtime& r = rt();
  if (p == nullptr) return;
  Region region;
  region.name = name;
  region.base = static_cast<const char*>(p);
  region.bytes = bytes;
  region.access = access;
  region.extent = bytes;
  bool empty = bytes == 0;
  for (const Dimension& d : dimensions) {
    empty = empty || d.count == 0;
    if (d.count <= 1 || d.stride == 0) continue;
    region.dimensions.push_back(d);
    region.extent += (d.count - 1) * d.stride;
  }
  if (empty) return;
  std::sort(region.dimensions.begin(), region.dimensions.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
  if (access != Access::read)
    region.pages.resize((region.extent + Region::kPage - 1) / Region::kPage);
  r.regions.push_back(std::move(region));
}

void clear_regions() { rt().regions.clear(); }

const char* check_written(const char* kernel) {
  Runtime& r = rt();
  for (Region& region : r.regions) {
    if (region.access != Access::write) continue;
    for (int64_t i = 0; i < region.extent; ++i) {
      if (region.cell(i).initialised || offset_in(region, region.base + i, 1) < 0) continue;
      r.text = std::string("kernel ") + kernel + ": " + region.name + " + " + std::to_string(i) +
               " bytes has not been written";
      return r.text.c_str();
    }
  }
  return nullptr;
}

Where where_is(const void* address, const Region** region) {
  Runtime& r = rt();
  const char* p = static_cast<const char*>(address);
  if (p >= r.shared.data() && p < r.shared.data() + r.shared.size()) return Where::shared;
  int64_t offset;
  *region = region_of(p, 1, Kind::read, &offset);
  return *region != nullptr ? Where::global : Where::other;
}

bool is_shared(const void* p) {
  const Region* region;
  return where_is(p, &region) == Where::shared;
}

// ---- Shared memory ----

void begin_block_memory() {
  Runtime& r = rt();
  if (r.shared.empty()) {
    r.shared.resize(kSharedBytes + 128);
    r.shared_cells.resize(kSharedBytes + 128);
    r.shared_used = r.shared.size();  // all of it is poisoned the first time
  }
  memset(r.shared.data(), kPoisonByte, std::min(r.shared.size(), r.shared_used + 128));
  std::fill_n(r.shared_cells.begin(), r.shared_used, Cell{});
  r.shared_used = r.dynamic_bytes;
  r.pieces.clear();
  r.read_sets.clear();
}

// The start of the arena, on 128 bytes.
static size_t arena_shift() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(rt().shared.data());
  return (128 - at % 128) % 128;
}

void* dynamic_shared_memory(size_t bytes) {
  Runtime& r = rt();
  if (bytes > r.dynamic_bytes)
    fault("dynamic_shared: a layout of %zu bytes, but the launch asked for %zu", bytes,
          r.dynamic_bytes);
  return r.shared.data() + arena_shift();
}

void* static_shared_memory(const void* key, size_t bytes, size_t alignment) {
  Runtime& r = rt();
  for (const Runtime::Piece& piece : r.pieces)
    if (piece.key == key) return r.shared.data() + arena_shift() + piece.offset;
  size_t offset = r.shared_used + kRedZone;
  alignment = std::max<size_t>(alignment, 16);
  offset = (offset + alignment - 1) / alignment * alignment;
  size_t all = bytes;  // without the red zones, which hardware has not
  for (const Runtime::Piece& piece : r.pieces) all += piece.bytes;
  if (all > kSharedUnasked)
    fault("static_shared: %zu bytes in all: a kernel has at most %zu", all, kSharedUnasked);
  if (all + r.dynamic_bytes > shared_of_block() || offset + bytes + kRedZone > kSharedBytes)
    fault("static_shared: %zu bytes beside %zu dynamic ones: a block has at most %zu", all,
          r.dynamic_bytes, shared_of_block());
  r.pieces.push_back({key, offset, bytes});
  r.shared_used = offset + bytes;
  return r.shared.data() + arena_shift() + offset;
}

// ---- Accesses ----

void check_access(const Thread& thread, const void* address, size_t bytes, Kind kind,
                  bool aligned) {
  Runtime& r = rt();
  const char* p = static_cast<const char*>(address);
  if (p >= r.stacks && p < r.stacks + kMaxThreads * r.stack_bytes) {
    const int owner = static_cast<int>((p - r.stacks) / r.stack_bytes);
    if (owner != thread.index)
      bad_access(kind, bytes, "local memory of thread " + std::to_string(owner));
    return;
  }
  const char* frame = static_cast<const char*>(r.frame);
  if (p >= frame && p + bytes <= frame + r.frame_bytes) {
    if (kind != Kind::read) bad_access(kind, bytes, "a parameter of the kernel");
    return;
  }
  if (p >= r.shared.data() && p < r.shared.data() + r.shared.size()) {
    const size_t offset = p - r.shared.data() - arena_shift();
    if (aligned && offset % bytes != 0)
      bad_access(kind, bytes, Spot{nullptr, offset}.name() + ": misaligned");
    if (!shared_exists(offset, bytes))
      bad_access(kind, bytes,
                 Spot{nullptr, offset}.name() + ": out of bounds: the block has " +
                     std::to_string(r.dynamic_bytes) + " bytes of dynamic shared memory and " +
                     std::to_string(r.pieces.size()) + " static object(s)");
    for (size_t i = 0; i < bytes; ++i)
      check_cell(r.shared_cells[offset + i], thread, kind, bytes, {nullptr, offset + i});
    return;
  }
  int64_t offset;
  Region* region = region_of(p, static_cast<int64_t>(bytes), kind, &offset);
  if (region == nullptr) {
    if (kind == Kind::read && in_image(p)) return;  // a constant of the program
    bad_access(kind, bytes, described(p) + ": out of bounds");
  }
  if (aligned && reinterpret_cast<uintptr_t>(p) % bytes != 0)
    bad_access(kind, bytes, region->name + " + " + std::to_string(offset) + " bytes: misaligned");
  if (region->access == Access::read) {
    if (kind != Kind::read) bad_access(kind, bytes, region->name + " is only read");
    return;
  }
  for (size_t i = 0; i < bytes; ++i)
    check_cell(region->cell(offset + i), thread, kind, bytes, {region, offset + i});
}

void read_memory(void* value, const void* p, size_t bytes, const char* wrapper) {
  Runtime& r = rt();
  void* site = __builtin_return_address(0);
  check_access(*r.current, p, bytes, Kind::read);
  if (r.counting) note_access(*r.current, p, bytes, Kind::read, wrapper, site, -1);
  memcpy(value, p, bytes);
}
void write_memory(void* p, const void* value, size_t bytes, const char* wrapper) {
  Runtime& r = rt();
  void* site = __builtin_return_address(0);
  check_access(*r.current, p, bytes, Kind::write);
  if (r.counting) note_access(*r.current, p, bytes, Kind::write, wrapper, site, -1);
  memcpy(p, value, bytes);
}
void access(const void* p, size_t bytes, Kind kind, const char* wrapper) {
  Runtime& r = rt();
  void* site = __builtin_return_address(0);
  check_access(*r.current, p, bytes, kind);
  if (r.counting) note_access(*r.current, p, bytes, kind, wrapper, site, -1);
}
void access_as(int lane, const void* p, size_t bytes, Kind kind, const char* wrapper, int phase) {
  Runtime& r = rt();
  // The lanes wait for each other here, so their order is that of the thread that runs.
  Thread& thread = r.threads[r.current->warp * kWarpSize + lane];
  Thread* const running = r.current;
  r.current = &thread;
  check_access(thread, p, bytes, kind);
  if (r.counting) note_access(thread, p, bytes, kind, wrapper, running->site, phase);
  r.current = running;
}
void peek_memory(void* value, const void* p, size_t bytes) { memcpy(value, p, bytes); }
void poke_memory(void* p, const void* value, size_t bytes) { memcpy(p, value, bytes); }

// ---- Asynchronous copies ----

void copy_async(void* shared, const void* global, int bytes, int read) {
  Runtime& r = rt();
  Thread& me = *r.current;
  void* site = __builtin_return_address(0);
  const Region* region;
  if (where_is(shared, &region) != Where::shared)
    stop_with("copy_async: the destination is not shared memory");
  // Issuing counts as a write: what others have read there must be ordered before it.
  check_access(me, shared, bytes, Kind::write);
  if (r.counting) note_access(me, shared, bytes, Kind::write, "copy_async", site, -1);
  if (read > 0) {
    if (where_is(global, &region) != Where::global)
      stop_with("copy_async: the source is " + described(static_cast<const char*>(global)) +
                ": global memory is wanted");
    check_access(me, global, read, Kind::read);
    if (r.counting) note_access(me, global, read, Kind::read, "copy_async", site, -1);
  }
  Thread::Copy copy = {};
  copy.shared = static_cast<uint32_t>(static_cast<char*>(shared) - r.shared.data() - arena_shift());
  copy.global = global;
  copy.bytes = bytes;
  copy.read = read;
  memcpy(copy.data, global, read);
  for (int i = 0; i < bytes; ++i) r.shared_cells[copy.shared + i].pending = true;
  me.groups.back().push_back(copy);
  if (r.settings.landing == Landing::early) {
    memset(shared, 0, bytes);
    memcpy(shared, copy.data, read);
  } else {
    memset(shared, kPoisonByte, bytes);  // neither what was there nor what will be
  }
}

void copy_async_commit() {
  Runtime& r = rt();
  if (r.counting) ++r.counting->instructions["copy_async_commit"];
  r.current->groups.emplace_back();
}

void copy_async_wait(int pending) {
  Runtime& r = rt();
  if (r.counting) ++r.counting->instructions["copy_async_wait"];
  Thread& me = *r.current;
  while (static_cast<int>(me.groups.size()) - 1 > pending) {
    for (const Thread::Copy& copy : me.groups.front()) {
      char* to = r.shared.data() + arena_shift() + copy.shared;
      if (r.settings.landing == Landing::late) {
        memset(to, 0, copy.bytes);
        if (copy.read > 0) memcpy(to, copy.global, copy.read);
      }
      for (int i = 0; i < copy.bytes; ++i) {
        Cell& cell = r.shared_cells[copy.shared + i];
        cell.pending = false;
        cell.writer = static_cast<int16_t>(me.index);
        cell.write_epoch = me.epoch;
        cell.initialised = true;
      }
    }
    me.groups.erase(me.groups.begin());
  }
}

}  // namespace gemma2::emulator
