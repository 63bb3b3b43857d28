#define MARLIN_ELEMENT __nv_bfloat16
#include "cuda/sm90/decode_instances.inc"
