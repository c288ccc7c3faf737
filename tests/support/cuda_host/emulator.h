#pragma once
// Runs the CUDA C++ of csrc/cuda on the host, compiled by g++: every thread of a block is a fiber
// with its own stack, and the blocks of a grid run one after the other.
//
// What it makes visible that a correct kernel never shows:
//   - dynamic shared memory starts as NaN in every block, and nothing behind its end may be
//     written (what is declared with a size keeps what the block before left in it);
//   - what cp.async fetches arrives when its thread waits for it, no earlier;
//   - the threads of a block run one by one between two barriers, in either order: a missing
//     barrier gives another result in at least one of them;
//   - all threads of a block (or, for a shuffle, of a warp) have to reach the same barrier.
// What it cannot see: bank conflicts, races that need two threads at the very same time, the 2 ulp
// of the special-function unit.  A misaligned 16-byte access may end the process.
//
// Included in front of every prepared source (see cuda_host_build.py).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of sm_90; a block that wants more cannot start
constexpr size_t kGuard = 4 * 1024;        // behind the shared memory
constexpr size_t kStack = 64 * 1024;

struct Copy {
  void* to;
  const void* from;
};

enum class State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  uint3 thread;
  int index;                             // in the block
  int shuffles;                          // so far
  std::vector<Copy> open;                // asynchronous copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, not yet waited for
};

// Settings.
inline int multiprocessors = 1;
inline bool descending = false;  // the order in which threads run between two barriers

// What went wrong first; empty while all is well.  A launch stops there, and so do later ones.
inline std::string failure;

// The running launch.
inline std::function<void()> kernel;
inline dim3 grid_size, block_size;
inline uint3 block_index;
inline size_t shared_bytes;
alignas(128) inline unsigned char shared_memory[kMaxShared + kGuard];
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline double lanes[kMaxThreads][2];  // what a thread gives to a shuffle, even and odd calls

inline void fail(const std::string& what) {
  if (failure.empty()) failure = what;
}

inline void wait_as(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

inline void run_fiber() {
  kernel();
  wait_as(State::kDone);
}

inline void start_fiber(Fiber& fiber, int index) {
  fiber.state = State::kReady;
  fiber.index = index;
  fiber.shuffles = 0;
  fiber.open.clear();
  fiber.groups.clear();
  const unsigned i = index;
  fiber.thread = {i % block_size.x, i / block_size.x % block_size.y,
                  i / block_size.x / block_size.y};
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

inline bool all(int begin, int end, State state) {
  return std::all_of(fibers.begin() + begin, fibers.begin() + end,
                     [&](const Fiber& fiber) { return fiber.state == state; });
}

inline void release(int begin, int end) {
  for (int i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

// Runs threads [begin, end) until each waits or is done.
inline void run_ready(int begin, int end) {
  for (int i = begin; i < end; ++i) {
    Fiber& fiber = fibers[descending ? begin + end - 1 - i : i];
    if (fiber.state != State::kReady) continue;
    current = &fiber;
    swapcontext(&scheduler, &fiber.context);
  }
}

// Runs one warp, shuffles included, up to a barrier of the block or to its end.
inline void run_warp(int begin, int end) {
  run_ready(begin, end);
  while (all(begin, end, State::kAtShuffle)) {
    release(begin, end);
    run_ready(begin, end);
  }
  const auto waits = [](const Fiber& fiber) { return fiber.state == State::kAtShuffle; };
  if (std::any_of(fibers.begin() + begin, fibers.begin() + end, waits))
    fail("a warp shuffle that not all threads of the warp reach");
}

inline void run_block(int threads) {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));  // NaN in every type
  for (int i = 0; i < threads; ++i) start_fiber(fibers[i], i);
  const int warps = (threads + kWarp - 1) / kWarp;
  while (failure.empty() && !all(0, threads, State::kDone)) {
    for (int i = 0; i < warps; ++i) {
      const int warp = descending ? warps - 1 - i : i;
      run_warp(warp * kWarp, std::min((warp + 1) * kWarp, threads));
    }
    if (all(0, threads, State::kAtBarrier))
      release(0, threads);
    else if (!all(0, threads, State::kDone))
      fail("a barrier that not all threads of the block reach");
  }
  if (std::any_of(shared_memory + shared_bytes, std::end(shared_memory),
                  [](unsigned char byte) { return byte != 0xff; }))
    fail("a write behind the shared memory of the block");
}

// kernel<<<grid, block, shared, stream>>>(...) with `body` as the call.
template <typename Body>
void launch(dim3 grid, dim3 block, size_t shared, Body body) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > kMaxThreads) return fail("a block of " + std::to_string(threads));
  if (shared > kMaxShared) return fail("shared memory of " + std::to_string(shared) + " bytes");
  if (grid.x * grid.y * grid.z == 0) return fail("an empty grid");
  kernel = body;
  grid_size = grid;
  block_size = block;
  shared_bytes = shared;
  if (fibers.size() < static_cast<size_t>(threads)) fibers = std::vector<Fiber>(threads);
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
        if (!failure.empty()) return;
        run_block(threads);
      }
}

inline void copy_async(void* to, const void* from, size_t bytes) {
  const auto at = static_cast<unsigned char*>(to);
  if (bytes != 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    return fail("cp.async of something other than 16 aligned bytes");
  if (at < shared_memory || at + bytes > shared_memory + shared_bytes)
    return fail("cp.async to something outside the shared memory of the block");
  current->open.push_back({to, from});
}

inline void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

inline void wait_for_copies(size_t groups_left) {
  for (auto& groups = current->groups; groups.size() > groups_left; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}

// Two sets of places take turns: nobody is two shuffles ahead of a thread of its warp.
template <typename A>
A shuffle_xor(A value, int mask) {
  const int set = current->shuffles++ % 2;
  const int from = current->index ^ mask;
  lanes[current->index][set] = value;  // exact: A is float or double
  wait_as(State::kAtShuffle);
  return static_cast<A>(lanes[from][set]);
}

// The instructions that the kernels write as PTX.  .ftz: denormal numbers count as zero.
namespace ptx {
inline float ftz(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline float ex2_approx_ftz_f32(float x) { return ftz(std::exp2(ftz(x))); }
inline float rcp_approx_ftz_f32(float x) { return ftz(1.0f / ftz(x)); }
inline float max_nan_f32(float x, float y) {
  return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y);
}
}  // namespace ptx

}  // namespace emulator

// The names that CUDA C++ knows without a header, and those of <cuda_pipeline.h>.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // the threads of a block see one; blocks follow each other
#define threadIdx emulator::current->thread
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define cudaFuncSetAttribute(...) static_cast<void>(0)
#define cudaGetDevice(device) static_cast<void>(*(device) = 0)
#define cudaDeviceGetAttribute(value, ...) static_cast<void>(*(value) = emulator::multiprocessors)

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait_as(emulator::State::kAtBarrier); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t{a} * b >> 32; }
template <typename A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  return emulator::shuffle_xor(value, mask);
}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { emulator::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { emulator::wait_for_copies(groups); }
