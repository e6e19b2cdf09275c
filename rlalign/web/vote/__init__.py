"""The page where people choose: a Starlette application that knows no Ray, no torch and no policy.

    browser -> guard: host, origin, size -> routes: who, how often, what -> desk: ballots, votes

desk.py          what the page asks of whoever holds the ballots, and the records between the two
ballots_desk.py  that desk over the store of rlalign/ballots
chain.py         where a person is in the mode chain
messages.py      the JSON of a browser, read by hand, and the JSON that it gets
guard.py         what every request passes first, and the headers of every answer
rates.py         how often a person and an address may ask
people.py        join links, the file of the secret, and the keys under which pictures are asked for
words.py         the page's languages, and which words a prompt may not hold
results.py       the numbers on /results, ready to be shown
routes/          what each address answers
app.py           the routes together, behind the guard
serving.py       the settings of the server, and the server

static/, templates/ and languages/ are what the browser gets. There is no build step: the modules in
static/ are the ones that are written.
"""
