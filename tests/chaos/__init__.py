"""A randomized tester of the whole client, on virtual time.

The server here is written from Kadoa's documentation and from what is known of
the wire. It shares no code with `kadoa_trio.testing`, so that a
misunderstanding of the simulator's is not repeated.

Map of the modules::

    _program      what happens in a test: the server's style, the client's options, the steps; drawn from a seed
    _pipes        a TCP connection in memory that can be reset, half open, or full
    _server       the server: log of events, connections, replays, HTTP side
    _store        a cursor store that fails, hangs, lies and survives crashes
    _promises     what must hold: the checks
    _world        runs a program: processes that are opened, crashed, left and opened again
    _mutations    clients that are broken on purpose, each of which must be caught
    __main__      many seeds from a command line

``python -m tests.chaos --help`` says how to run it.
"""
