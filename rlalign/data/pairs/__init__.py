"""Sets of preference pairs: a caption, two pictures or clips, and how a judge liked them.

columns.py  the Parquet columns of Pick-a-Pic: written whole or not at all, read in row batches
listed.py   lists in JSON: HPD v2's, and pairs of chosen and rejected
types.py    which Arrow types a column may have
rows.py     a row, decoded
settings.py where pairs come from; what gives them by round (``Pairing``)
reader.py   which pairs of files a round learns from, in an order that depends on seed and round
            alone
votes.py    people's votes as pairs, with a card; Label Studio's exports too
campaign.py the pairs of a campaign that a run learns from
growing.py  pairs out of people's votes, while they vote
ranking.py  pairs out of a round's own samples

May import core, diffusion's keyed noise and ballots.
"""
