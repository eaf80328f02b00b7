"""`lmcode doctor`: can this host, or can these hosts together, run the project?

    row.py     what is found        host.py, folder.py   the checks of one host
    agent.py   runs on each host    link.py              lines to and from the agents, over ssh or srun
    hosts.py   the conversation with all hosts           compare.py   from their answers to rows
"""
