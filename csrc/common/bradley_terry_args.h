// Arguments of Bradley-Terry fits. P players, E edges (pairs that met, with one row of F covariates each), n = P + F
// parameters, one more (log nu) with Davidson's ties.
#pragma once

#include <cstdint>

namespace pyalign {

enum class FitStatus : int8_t { kConverged, kNoMaximum, kNotConverged };

struct BradleyTerryArgs {
    int64_t players, edges, features;
    bool davidson;
    const int64_t* first;      // [E] the players of an edge
    const int64_t* second;     // [E]
    const double* covariates;  // [E, F] first minus second

    // Battles that are alike: same edge, outcome and weight.
    int64_t units;
    const int64_t* edge;    // [U]
    const int8_t* outcome;  // [U] 0 first won, 1 second won, 2 a tie
    const double* weight;   // [U]
    // How many of them each sample has; null: each sample draws as many battles as there are, with replacement.
    const int64_t* counts;        // [S, U]
    const int32_t* unit_of;       // [battles] the unit of every battle, to draw from
    int64_t battles;              // < 2^32
    uint64_t seed, first_sample;  // sample s draws from stream first_sample + s

    double prior;
    double tolerance;     // on the largest entry of a step
    int64_t dense_limit;  // no n x n matrix beyond so many parameters
    const double* start;  // [n]
    bool check;           // whether to find out, for want of a prior, if a maximum exists

    int64_t samples;      // S
    double* parameters;   // [S, n]
    double* gradient;     // [S, n] or null
    int8_t* status;       // [S] FitStatus
    int32_t* iterations;  // [S]
};

}  // namespace pyalign
