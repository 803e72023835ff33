// One compiled kernel: the build compiles this file once for each line of instances.inc.
#include "grouped_kernel.cuh"

template cudaError_t latent_moe::launch<LATENT_MOE_INSTANCE_INDEX>(Args const&, int, cudaStream_t);
template int latent_moe::max_experts<LATENT_MOE_INSTANCE_INDEX>();
