"""Contenders for the reverse sampler, checked and then timed in turn, for `gdpd bench` and the benchmarks in bench/.

``cases`` names what is measured, ``rivals`` holds the sampler as people write it by hand, ``check`` compares a
contender with the float64 reference, ``clock`` takes times, ``measure`` joins them, ``report`` is the command's run.
"""
