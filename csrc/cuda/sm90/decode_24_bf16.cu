#define MARLIN_ELEMENT __nv_bfloat16
#define MARLIN_SPARSE true
#define MARLIN_TABLE "plan/decode_24_table.inc"
#include "cuda/sm90/decode_instances.inc"
