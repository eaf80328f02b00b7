"""`lmcode doctor`: can this host, or can these hosts together, run the project?

row.py     what is found        host.py, folder.py   the checks of one host
agent.py   runs on each host    link.py              connections to the agents, over ssh or srun
hosts.py   the checks over several hosts             compare.py   from the hosts' answers to rows
"""
