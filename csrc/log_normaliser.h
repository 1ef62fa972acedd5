// log sum exp of rows on one CPU thread; flr_kernels.log_normaliser's backend "host".
#pragma once
#include <cstdint>

namespace flr {

// out[r] for rows [rows, size] of float32 that are `stride` elements apart; not finite where a row holds NaN or +inf,
// or is -inf throughout.
void log_normaliser_host(const float* logits, int64_t rows, int64_t size, int64_t stride, float* out);

}  // namespace flr
