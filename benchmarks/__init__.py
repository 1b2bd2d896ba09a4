"""The benchmark suite, installed as ``llmkern.benchmarks``.

``suite`` says what a case is, ``bench_<op>`` define the cases, ``worker`` runs one implementation in a process of its
own, ``runner`` interleaves the workers, ``machine`` measures the limits, ``report`` and ``html`` tell.
"""
