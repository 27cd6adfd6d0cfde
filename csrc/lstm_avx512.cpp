// The kernels of the LSTM, for one instruction set.
#include "isa_avx512.h"
#include "lstm_kernels.h"
