// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11):
// four random words from a 128-bit counter and a 64-bit key, as the crate `rand_philox` defines them.
// This file includes nothing.
//
// A round is two 32 x 32 -> 64 bit multiplications and two three-way exclusive ors, so a block is 20
// wide multiplications. They run at a quarter of the rate of an FMA and are what a kernel counts. The
// round keys come ready-made from the host: each is an operand of one exclusive or.

#pragma once

/// The words w0..w3 of `counter`; `round_keys` holds (k0, k1) of each round.
///
/// Everything is inlined, so where two blocks share words of the counter the compiler shares what only
/// depends on them: blocks of one octet column in several rows share three of the first four
/// multiplications, and all blocks of a launch the one of the stream number.
__device__ __forceinline__ uint4 philox4x32_10(uint4 counter, const unsigned (&round_keys)[20]) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2511F53ull * counter.x;
        const unsigned long long b = 0xCD9E8D57ull * counter.z;
        counter = make_uint4(
            static_cast<unsigned>(b >> 32) ^ counter.y ^ round_keys[2 * round],
            static_cast<unsigned>(b),
            static_cast<unsigned>(a >> 32) ^ counter.w ^ round_keys[2 * round + 1],
            static_cast<unsigned>(a));
    }
    return counter;
}
