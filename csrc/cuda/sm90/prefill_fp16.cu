#define MARLIN_ELEMENT __half
#define MARLIN_SPARSE false
#define MARLIN_TABLE "plan/prefill_table.inc"
#include "cuda/sm90/prefill_instances.inc"
