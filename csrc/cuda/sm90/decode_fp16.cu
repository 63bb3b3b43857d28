#define MARLIN_ELEMENT __half
#include "cuda/sm90/decode_instances.inc"
