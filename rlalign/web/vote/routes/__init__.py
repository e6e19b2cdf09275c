"""The routes of the page, by what they are about; ``app.py`` puts them together.

visitors.py  who asks, and how often they may; what every other module stands on
answers.py   forms that answers have, of refusals and faults too
people.py    the page itself, and joining
ballots.py   the open ballot, votes, undo, prompts, pictures
events.py    how far a person is, as server-sent events
results.py   the numbers, and the administrator who sees them
"""
