"""`imdsproxy takeover KIND` and `imdsproxy handback KIND`: from Neutron's agents to imdsproxy, and back.

| module | content |
|---|---|
| `seen.py` | pure: observed state (`Seen`), the kind of agent (`Kind`), its option, its idle HAProxy |
| `steps.py` | shared steps: words, effect, and what undoes each; a kind's interface (`Takeover`) |
| `KIND.py` | a `Takeover` and its own steps; from the observed state alone it computes the steps of both directions |
| `genuine.py` | pure: tells agents from other users' processes |
| `agents.py` | finds running agents, reads and changes their settings files |
| `observe.py` | reads the host's and the daemon's state into a `Seen` |
| `actor.py` | what steps share: the daemon's client, commands, waits |

The commands are in `cli/takeover.py`. To add a kind, write a module of that name with a `KIND` and add the name to
`KINDS` there. A new step is one class, in the module of its kind or, if kinds share it, in `steps.py`.
"""
