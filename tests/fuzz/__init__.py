"""Damaged and hostile model folders: every reader gives an error that names the file, or the truth.

`python -m tests.fuzz --cases 10000` draws folders, reads them in a few worker processes that are
watched from outside, and counts what came of it. samples.py: the healthy folders; damage.py: what is
done to them; expected.py: what they say, read by other code than the package's; readers.py: who
reads; worker.py: one case under guard; campaign.py: many.
"""
