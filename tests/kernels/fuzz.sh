#!/usr/bin/env bash
# Builds kernel_fuzz and runs it:
#
#   fuzz.sh address,undefined [arguments of kernel_fuzz]   with these sanitizers
#   fuzz.sh thread            [arguments of kernel_fuzz]
#   fuzz.sh arm               [arguments of kernel_fuzz]   for 64-bit Arm, with and without the dot products, under qemu
set -euo pipefail
what=$1; shift
source=$(cd "$(dirname "$0")/../.." && pwd)
build=${FUZZ_BUILD:-$source/build/fuzz}/$what
options=(-DJAX_APT_FUZZ=ON)
if [ "$what" = arm ]; then
  options+=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++)
else
  options+=(-DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS=-fsanitize=$what -fno-sanitize-recover=all")
fi
cmake -S "$source" -B "$build" "${options[@]}" "-DPython_EXECUTABLE=${PYTHON:-$(command -v python3)}" > /dev/null
cmake --build "$build" --target kernel_fuzz --parallel 2 > /dev/null
[ "$what" = arm ] || exec "$build/kernel_fuzz" "$@"
for cpu in max neoverse-n1 cortex-a53; do  # with sudot, with sdot alone, with neither
  qemu-aarch64 -cpu "$cpu" -L /usr/aarch64-linux-gnu "$build/kernel_fuzz" "$@"
done
