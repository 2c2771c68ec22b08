"""Triton kernels, each with a host wrapper: plain arrays and a launcher in, a list of Calls out.

A wrapper writes every element of its outputs. `supports_*` beside it says, from shapes and dtypes alone, whether it
covers a case; called outside of that, or with strides it cannot walk, a wrapper raises ValueError.
"""
