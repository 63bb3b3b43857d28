#define MARLIN_ELEMENT __nv_bfloat16
#define MARLIN_SPARSE false
#define MARLIN_TABLE "plan/prefill_table.inc"
#include "cuda/sm90/prefill_instances.inc"
