#define MARLIN_ELEMENT __half
#define MARLIN_SPARSE true
#define MARLIN_TABLE "plan/prefill_24_table.inc"
#include "cuda/sm90/prefill_instances.inc"
