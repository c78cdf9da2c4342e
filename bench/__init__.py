"""Benchmarks of moeshm against its floors and its peers; one module per question asked.

`ring`, `call`, `replay`, `policy` and `kernels` ask the questions, `harness` answers how a run is
made and summarised, `contenders` and the two C programs are what is measured. docs/benchmarks.md
describes them.
"""
