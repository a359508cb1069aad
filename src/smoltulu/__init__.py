"""Tulu-3-style post-training of small language models as one Prefect workflow.

The folders of the repository, `flows/ tasks/ artifacts/ schemas/ recipes/`, are the subpackages of `smoltulu`: links
beside this file lead to them. A wheel holds copies, so that it puts nothing but `smoltulu` into site-packages.
"""
