"""The web page: the same requests as every other door, by hand.

``axes`` reads grids in AUTOMATIC1111's syntax and ``sheet`` draws them, ``form`` turns a form into
a request and back, ``run`` follows jobs, ``desk`` keeps what visitors make, ``views`` writes what
is seen, ``controls`` and ``layout`` say where things stand, ``page`` what happens, and ``mount``
serves it beside the interfaces. All of it speaks to a server through
:mod:`safelight.serve.client`, in this process or elsewhere.
"""
