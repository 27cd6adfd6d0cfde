// The kernels of the LSTM, for one instruction set.
#include "isa_avx512_bf16.h"
#include "lstm_kernels.h"
