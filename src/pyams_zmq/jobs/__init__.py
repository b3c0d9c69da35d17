# SPDX-License-Identifier: ZPL-2.1
"""Jobs: calls whose replies go into a journal, which no crash can lose.

========================  ==========================================================
:mod:`.journal_file`      where the file may be, and that one broker at a time uses it
:mod:`.schema`            its tables, and their versions
:mod:`.journal`           transactions, and the work that keeps the file small
:mod:`.job_table`         each change of the state of a job, in a transaction
:mod:`.waiting`           which of the jobs that wait begin next
:mod:`.reader`            reading, in the thread of the loop
:mod:`.writer`            writing, in a thread that waits for the disk
:mod:`.job_messages`      what clients ask for, and what they get
:mod:`.job_replies`       replies of jobs that are not those of their methods
:mod:`.watchers`          clients that wait for a change of a job
========================  ==========================================================
"""

from pyams_zmq.handler.job import Job, JobCancelled, zmq_job

__all__ = ['Job', 'JobCancelled', 'zmq_job']
