// torch's own threads, borrowed.
//
// After a product torch's second OpenMP thread spins for milliseconds in wait of the next one. A
// thread of ours that wakes then gets no core, and one core computes the experts alone (measured:
// docs/architecture.md, *The CPU expert kernels*). A loop that is handed to the same OpenMP
// runtime, from the thread that called torch, is begun by that spinning thread at once.
//
// Nothing is linked: the runtime is the one that torch has loaded, found by name, and entered
// through GOMP_parallel, the stable entry point that libgomp has and LLVM's and Intel's runtimes
// offer as well. Where none is found, in a process without torch, ThreadPool has its own threads.
#pragma once

namespace moe_offload {

// Runs body(data) on num_threads threads, the caller among them, and returns when all are done.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned num_threads,
                                unsigned flags);

// Null where torch has loaded no OpenMP runtime. Looked up at the first call that finds torch.
OpenMpParallel torch_openmp();

}  // namespace moe_offload
