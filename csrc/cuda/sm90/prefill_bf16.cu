#define MARLIN_ELEMENT __nv_bfloat16
#include "cuda/sm90/prefill_instances.inc"
