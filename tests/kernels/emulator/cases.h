// The command line of the drivers of factor_attention: eight numbers a case.
#pragma once
#include <cstdlib>

// How many of the cases failed.
template <class Case>
int run_cases(bool (*run)(const Case&), int count, char** arguments) {
  int failed = 0;
  for (int i = 1; i + 8 <= count; i += 8) {
    int x[8];
    for (int j = 0; j < 8; ++j) x[j] = std::atoi(arguments[i + j]);
    failed += !run({x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]});
  }
  return failed;
}
