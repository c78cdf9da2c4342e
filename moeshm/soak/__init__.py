"""`moeshm soak`: load, kills, hangs, hostile peers and moving experts, and every result checked.

`director` conducts; `actors` are the processes, `caller` what runs in those that call (`calls`,
`moves` with clients that are `lent`, and the `books` they keep); `schedule`, `injector` and
`hostile` do the damage; `pool`, `ledger`, `leaks` and `inspection` find what went wrong, and
`report` tells it.
"""
