#define MARLIN_ELEMENT __half
#include "cuda/sm90/prefill_instances.inc"
