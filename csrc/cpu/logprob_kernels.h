// The log-prob kernels of one instruction set: entries of its table, which is in distill_kernels.cpp.
#pragma once

#include "common/platform.h"
#include "cpu/kernels.h"

PYALIGN_BEGIN

size_t logprob_scratch(const LogprobArgs& args);
void logprob(const LogprobArgs& args, cpu::Span span);

PYALIGN_END
