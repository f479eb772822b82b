"""The web page: the same requests as every other door, by hand.

``axes`` reads grids in AUTOMATIC1111's syntax, ``form`` turns a form into a request and back, ``run``
follows a job, ``views`` writes what is seen, ``page`` puts the components together, ``mount`` serves
them beside the interfaces. All of it speaks to a server through :mod:`safelight.serve.client`, in this
process or elsewhere.
"""
