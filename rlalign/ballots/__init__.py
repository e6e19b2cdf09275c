"""The record of people's choices, and what it says: ballots, votes, strengths, agreement.

records.py       what is asked and answered, and what an answer must be like
store.py         the store and its verbs; SQLite by a path, PostgreSQL by a URL
connect.py       opens and migrates a database; what differs between the two
schema.py        the tables; ``migrations/`` their history
audit.py         compares what a store keeps at hand with its log
deal.py          what is asked next: gold, repeats and shared pairs mixed in by stated shares
choose.py        which pair of many: random, uncertain, Fisher, large gap, winner stays
strengths.py     Bradley-Terry with ties and a left intercept, intervals over annotators
agreement.py     Krippendorff's alpha, plain agreement
quality.py       each person's gold accuracy, consistency, times, left share; rules
results.py       all of it as one record
label_studio.py  reads Label Studio's pairwise export

May import core alone; neither torch nor a web framework.
"""
