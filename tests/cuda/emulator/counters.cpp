// What a kernel did: bytes, requests, sectors, bank conflicts, instructions.

#include <algorithm>
#include <set>
#include <sstream>
#include <unordered_set>

#include "cuda/emulator/runtime.h"

namespace gemma2::emulator {
namespace {

constexpr uintptr_t kSector = 32;  // bytes
constexpr int kBanks = 32;         // of 4 bytes

// Lanes whose shared accesses go together: all with words of 4 bytes or less, half of them with 8,
// a quarter with 16 bytes.
int phase_of(const Request& q, int lane) {
  if (q.phase[lane] >= 0) return q.phase[lane];
  return q.bytes <= 4 ? 0 : q.bytes == 8 ? lane / 16 : lane / 8;
}

void finish_shared(const Request& q, Counters& c) {
  Counters::Bank& bank = c.shared[q.wrapper];
  ++bank.accesses;
  std::map<int, std::vector<int>> phases;
  for (int l = 0; l < kWarpSize; ++l)
    if (q.lanes >> l & 1) phases[phase_of(q, l)].push_back(l);
  for (const auto& [phase, lanes] : phases) {
    std::set<uintptr_t> words[kBanks];
    for (int l : lanes)
      for (uintptr_t w = q.address[l] / 4; w <= (q.address[l] + q.bytes - 1) / 4; ++w)
        words[w % kBanks].insert(w);
    size_t most = 0;
    for (const auto& bank_words : words) most = std::max(most, bank_words.size());
    // Atomics on one word follow each other.
    if (q.kind == Kind::atomic) {
      std::map<uintptr_t, size_t> same;
      for (int l : lanes) most = std::max(most, ++same[q.address[l]]);
    }
    bank.wavefronts += static_cast<int64_t>(most);
    ++bank.ideal;
  }
}

void finish_global(const Request& q, Counters& c, std::unordered_set<uintptr_t>& of_block) {
  Counters::Traffic& traffic = q.kind == Kind::read ? c.global_read : c.global_write;
  std::set<uintptr_t> sectors;
  for (int l = 0; l < kWarpSize; ++l) {
    if (!(q.lanes >> l & 1)) continue;
    traffic.bytes += q.bytes;
    for (uintptr_t s = q.address[l] / kSector; s <= (q.address[l] + q.bytes - 1) / kSector; ++s)
      sectors.insert(s);
  }
  ++traffic.requests;
  traffic.sectors += static_cast<int64_t>(sectors.size());
  for (uintptr_t sector : sectors)
    if (of_block.insert(sector).second) ++traffic.distinct;
}

template <typename Map, typename F>
void write_object(std::ostringstream& out, const Map& map, const F& value) {
  out << "{";
  bool first = true;
  for (const auto& [key, v] : map) {
    out << (first ? "" : ", ") << '"' << key << "\": ";
    value(v);
    first = false;
  }
  out << "}";
}

}  // namespace

void count(const char* wrapper, int64_t n) {
  if (rt().counting) rt().counting->instructions[wrapper] += n;
}

void note_access(const Thread& thread, const void* p, size_t bytes, Kind kind, const char* wrapper,
                 void* site, int phase) {
  Runtime& r = rt();
  const Region* region = nullptr;
  const Where where = where_is(p, &region);
  if (where == Where::other) return;  // registers that lie on the stack, parameters, constants
  r.counting->instructions[wrapper] += 1;
  if (where == Where::global)
    (kind == Kind::read ? r.counting->region_read : r.counting->region_written)[region->name] +=
        static_cast<int64_t>(bytes);
  // The k-th time that this thread comes to this place goes with the other lanes' k-th time.
  const uint32_t visit = const_cast<Thread&>(thread).visits[site]++;
  // One instruction may touch shared and global memory (copy_async).
  void* const key = reinterpret_cast<char*>(site) + (where == Where::shared ? 1 : 0);
  Request& q = r.requests[{thread.warp, {key, visit}}];
  if (q.lanes == 0) {
    q.wrapper = wrapper;
    q.kind = kind;
    q.shared = where == Where::shared;
    q.bytes = static_cast<uint32_t>(bytes);
  }
  q.lanes |= 1u << thread.lane;
  q.address[thread.lane] = reinterpret_cast<uintptr_t>(p);
  q.phase[thread.lane] = phase;
}

void finish_block_counters() {
  Runtime& r = rt();
  std::unordered_set<uintptr_t> read, written;
  for (const auto& [key, q] : r.requests)
    if (q.shared)
      finish_shared(q, *r.counting);
    else
      finish_global(q, *r.counting, q.kind == Kind::read ? read : written);
  r.requests.clear();
  for (Thread& t : r.threads) t.visits.clear();
}

std::string counters_json() {
  std::ostringstream out;
  const auto number = [&](int64_t n) { out << n; };
  const auto traffic = [&](const char* name, const Counters::Traffic& t) {
    out << ", \"" << name << "\": {\"bytes\": " << t.bytes << ", \"requests\": " << t.requests
        << ", \"sectors\": " << t.sectors << ", \"distinct\": " << t.distinct << "}";
  };
  write_object(out, rt().counters, [&](const Counters& c) {
    out << "{\"launches\": " << c.launches << ", \"blocks\": " << c.blocks
        << ", \"threads\": " << c.threads << ", \"barriers\": " << c.barriers;
    traffic("global_read", c.global_read);
    traffic("global_write", c.global_write);
    out << ", \"region_read\": ";
    write_object(out, c.region_read, number);
    out << ", \"region_written\": ";
    write_object(out, c.region_written, number);
    out << ", \"shared\": ";
    write_object(out, c.shared, [&](const Counters::Bank& b) {
      out << "{\"accesses\": " << b.accesses << ", \"wavefronts\": " << b.wavefronts
          << ", \"conflicts\": " << b.wavefronts - b.ideal << "}";
    });
    out << ", \"instructions\": ";
    write_object(out, c.instructions, number);
    out << "}";
  });
  return out.str();
}

}  // namespace gemma2::emulator
