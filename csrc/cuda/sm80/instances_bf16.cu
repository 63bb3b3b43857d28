#define MARLIN_ELEMENT __nv_bfloat16
#include "cuda/sm80/instances.inc"
