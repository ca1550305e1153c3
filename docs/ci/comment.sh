#!/bin/sh
# Puts a report under a pull request, or renews the one that an earlier run put there. Needs GitHub's `gh`.
#
#     sh comment.sh OWNER/REPOSITORY NUMBER gate-results/gate.md
#
# GH_TOKEN must allow writing to pull requests. The comment is found by the marker in its first line.

set -eu
if [ $# -ne 3 ] || ! [ -f "$3" ]; then
    echo "error: give the repository, the number of the pull request and the Markdown file" >&2
    exit 2
fi
repository=$1 number=$2 file=$3
case $number in '' | *[!0-9]*)
    echo "error: $number is no pull request" >&2
    exit 2
    ;;
esac

mine='.[] | select(.user.type == "Bot" and (.body | startswith("<!-- compress-eval -->"))) | .id'
found=$(gh api --paginate "repos/$repository/issues/$number/comments" --jq "$mine")
first=${found%%"
"*}
if [ -n "$first" ]; then
    gh api --silent --method PATCH "repos/$repository/issues/comments/$first" --field "body=@$file"
else
    gh api --silent --method POST "repos/$repository/issues/$number/comments" --field "body=@$file"
fi
