"""The lab beside noprop_example.py: other objectives and data sets, and blocks spread over processes.

It imports the script, which never imports it. python -m noprop_lab --help names the commands.

    settings.py   Config and Options of the lab: the script's, and what it does not know
    dt.py         the paper's own objective, NoProp-DT, and its block
    flows.py      what the next two share: one network for all t, its steps, its training, its pictures
    ct.py         NoProp-CT, in continuous time, with a learned noise schedule
    fm.py         NoProp-FM, flow matching
    backprop.py   the twin: the same chain, trained end to end
    cascade.py    a chain that learns from its own estimates, not from noise
    infobatch.py  the hybrid loss in fewer steps, which leave out what is learned already
    networks.py   networks and states for these configs
    data.py       Fashion-MNIST, KMNIST, CIFAR, folders of pictures
    pictures.py   a user's pictures as a data set has its own; digits are found on photographed paper
    parts.py      blocks that are trained alone, and put together
    parallel.py   blocks spread over processes, by torchrun
    search.py     several workers, on several machines
    early_exit.py an image leaves the chain once the answer is sure
    graphs.py     a training step as one CUDA graph
    demo.py       a page on which one draws a digit
    __main__.py   the commands
    weights/      the default's trained network
"""
