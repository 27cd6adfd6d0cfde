// The kernels of the LSTM, for one instruction set.
#include "isa_baseline.h"
#include "lstm_kernels.h"
