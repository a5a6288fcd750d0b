// The emulator's built-ins stand in for CUDA's own header.
#pragma once
#include "builtins.h"
