// takuma's kernels on the GPUs of this process.
#pragma once
#include "plan.h"

// Compiles and loads the kernels for the current device, unless they are. Not while a graph is being captured.
void prepare_kernels();

// Launches on the current device and stream.
void launch_kernel(const Launch &launch);
