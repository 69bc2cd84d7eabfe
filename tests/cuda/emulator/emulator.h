// The emulator's interface: what device.h (the names that kernels use) and the twins of PTX
// instructions build on. Tests only, never installed.
//
// A launch runs its blocks one after the other in a random, seeded order; the threads of a block
// are fibers of one system thread, each of which runs until it must wait for others. Whatever runs
// between two waits runs in a random order of threads (or in a chosen one: Order).
//
// Kernels are compiled with -fsanitize=thread, whose hooks (hooks.cpp) report every access to
// memory; the wrappers of device.h report theirs with their width as the hardware sees it. An
// access is checked against what the operator may touch (global regions, given by operators.cpp per
// call; shared memory of the block), for alignment, for reading what was never written, and for
// races: two accesses to a byte, one a write, by threads of a block that no barrier orders, or by
// two blocks of a launch.
//
// A fault ends the launch: emulator::launch gives its text, with kernel, block, thread and line.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <initializer_list>
#include <tuple>
#include <utility>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace gemma2::emulator {

// ---- Settings of the following launches (set from Python: control.cpp) ----

enum class Order : int { random, forward, backward };
enum class Landing : int { late, early };  // when asynchronous copies land

struct Settings {
  uint64_t seed = 0;
  Order order = Order::random;
  Landing landing = Landing::late;
  bool counting = false;  // counters cost time
};
Settings& settings();

// ---- Global memory that the next launches may touch ----

enum class Access : int { read, write, read_write, scratch };

struct Dimension {
  int64_t count, stride;  // stride in bytes; 0: the same memory again
};

// A tensor: pieces of `bytes` bytes, at every combination of the dimensions' strides from `p`.
// Anything between the pieces is out of bounds. `write` and `scratch`: not initialised before; of
// `write`, every byte must be written by the operator.
void add_region(const char* name, const void* p, int64_t bytes,
                std::initializer_list<Dimension> dimensions, Access access);
void clear_regions();

// Checks that every byte of the `write` regions has been written; null or a fault's text.
const char* check_written(const char* kernel);

// ---- Launch ----

// Runs entry(frame) in every thread. Null or a fault's text, which lives until the next launch.
// `kernel`: the function, for what is known of it.
const char* run_launch(const char* name, const void* kernel, dim3 grid, dim3 block,
                       size_t dynamic_shared, const void* frame, size_t frame_bytes,
                       void (*entry)(const void* frame));

template <typename... Parameters>
struct Frame {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> parameters;

  static void enter(const void* frame) {
    const Frame& f = *static_cast<const Frame*>(frame);
    std::apply(f.kernel, f.parameters);
  }
};

template <typename... Parameters>
const char* launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared,
                   void (*kernel)(Parameters...), Parameters... arguments) {
  const Frame<Parameters...> frame = {kernel, {arguments...}};
  return run_launch(name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared,
                    &frame, sizeof frame, &Frame<Parameters...>::enter);
}

// ---- Seen by the running thread ----

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
int lane();  // of the thread in its warp, 0 to 31

// Ends the launch with a fault at the calling line; does not return.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- Shared memory ----

void* dynamic_shared_memory(size_t bytes);  // fault if the launch has fewer
void* static_shared_memory(const void* key, size_t bytes, size_t alignment);  // one a key and block
bool is_shared(const void* p);

// ---- Accesses ----

enum class Kind : int { read, write, atomic };

// One access of the running thread, of `bytes` bytes as one instruction, checked and carried out.
// `wrapper` is what counters call it.
void read_memory(void* value, const void* p, size_t bytes, const char* wrapper);
void write_memory(void* p, const void* value, size_t bytes, const char* wrapper);
// Checked only; the caller then carries it out at once.
void access(const void* p, size_t bytes, Kind kind, const char* wrapper);
// Carried out, not checked.
void peek_memory(void* value, const void* p, size_t bytes);
void poke_memory(void* p, const void* value, size_t bytes);

// Reads and changes as one: among atomics there are no races.
template <typename T, typename F>
__attribute__((always_inline)) inline T atomic(T* p, const char* wrapper, const F& next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "integers of 4 or 8 bytes");
  access(p, sizeof(T), Kind::atomic, wrapper);
  T old;
  peek_memory(&old, p, sizeof(T));
  const T value = next(old);
  poke_memory(p, &value, sizeof(T));
  return old;
}

// The same on behalf of lane `lane` of the running thread's warp, for instructions of whole warps.
// Accesses of one `phase` of one instruction are compared for bank conflicts.
void access_as(int lane, const void* p, size_t bytes, Kind kind, const char* wrapper, int phase);

// ---- Waiting ----

void block_barrier();
void named_barrier(int id, int threads, bool wait);
void warp_barrier(unsigned lanes);
void device_fence();

// All lanes of `lanes` meet in one instruction, named by `what`. The last to come calls `work` with
// everybody's `data` (null for lanes outside the mask), then all go on. A fault if a lane gives
// another mask or instruction, is not in its own mask, or has ended. It orders no memory accesses,
// as shuffles do not.
void meet(const char* what, unsigned lanes, void* data,
          void (*work)(void* const* data, unsigned lanes));

// ---- Asynchronous copies into shared memory ----

// `read` bytes from `global`, then zeros up to `bytes`.
void copy_async(void* shared, const void* global, int bytes, int read);
void copy_async_commit();
void copy_async_wait(int pending);

// ---- Counters ----

void count(const char* wrapper, int64_t n = 1);  // instructions by wrapper, per thread

// Values of registers that hardware leaves undefined.
constexpr uint32_t kPoison = 0x7fb5a5a5;  // a NaN as float32

}  // namespace gemma2::emulator
