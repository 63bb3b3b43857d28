#define MARLIN_ELEMENT __half
#include "cuda/sm80/instances.inc"
