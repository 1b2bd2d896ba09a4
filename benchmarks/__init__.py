"""The benchmark suite, installed as ``llmkern.benchmarks``.

``suite`` says what a case is, and ``bench_<op>`` define the cases. ``peers`` names whom to measure; ``peer_<name>``
holds those with an interface of their own. ``worker`` runs one implementation in a process of its own, ``runner``
interleaves the workers, ``machine`` measures the limits. ``result`` keeps what was measured; ``report``, ``plots``,
``html`` and ``compare`` tell it.
"""
